#include "link_cipher.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

namespace tpimpi {
namespace {

// What is used of libcrypto, the same in its versions 1.1 and 3; see EVP_EncryptInit(3). Its headers need not be installed.
struct LibCrypto {
  void* (*new_context)();
  void (*free_context)(void*);
  const void* (*aes_256_gcm)();
  const void* (*chacha20_poly1305)();
  int (*control)(void* context, int command, int size, void* value);
  struct {
    int (*init)(void* context, const void* cipher, void* engine, const uint8_t* key, const uint8_t* nonce);
    int (*update)(void* context, uint8_t* out, int* written, const uint8_t* in, int size);
    int (*final)(void* context, uint8_t* out, int* written);
  } encrypt, decrypt;
};
constexpr int kGetTag = 0x10, kSetTag = 0x11;  // EVP_CTRL_AEAD_GET_TAG, EVP_CTRL_AEAD_SET_TAG

const LibCrypto& libcrypto() {
  static const LibCrypto found = [] {
    void* library = nullptr;
    for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.3.dylib"})
      if ((library = dlopen(name, RTLD_NOW | RTLD_LOCAL))) break;
    if (!library) throw std::runtime_error("there is no libcrypto");
    LibCrypto of;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (!function) throw std::runtime_error(std::string("libcrypto has no ") + name);
    };
    find(of.new_context, "EVP_CIPHER_CTX_new");
    find(of.free_context, "EVP_CIPHER_CTX_free");
    find(of.aes_256_gcm, "EVP_aes_256_gcm");
    find(of.chacha20_poly1305, "EVP_chacha20_poly1305");
    find(of.control, "EVP_CIPHER_CTX_ctrl");
    find(of.encrypt.init, "EVP_EncryptInit_ex");
    find(of.encrypt.update, "EVP_EncryptUpdate");
    find(of.encrypt.final, "EVP_EncryptFinal_ex");
    find(of.decrypt.init, "EVP_DecryptInit_ex");
    find(of.decrypt.update, "EVP_DecryptUpdate");
    find(of.decrypt.final, "EVP_DecryptFinal_ex");
    return of;
  }();
  return found;
}

struct Nonce {
  uint8_t bytes[12];

  Nonce(uint32_t tag, uint64_t number) {
    for (int i = 0; i < 4; ++i) bytes[i] = uint8_t(tag >> 8 * i);
    for (int i = 0; i < 8; ++i) bytes[4 + i] = uint8_t(number >> 8 * i);
  }
};

}  // namespace

LinkCipher::LinkCipher(const std::string& name, const uint8_t* key, bool opens)
    : context_(libcrypto().new_context(), libcrypto().free_context), opens_(opens) {
  const LibCrypto& library = libcrypto();
  const void* cipher = name == "AES-256-GCM" ? library.aes_256_gcm() : name == "ChaCha20-Poly1305" ? library.chacha20_poly1305() : nullptr;
  const auto init = opens ? library.decrypt.init : library.encrypt.init;
  if (!context_ || !cipher || !init(context_.get(), cipher, nullptr, key, nullptr))
    throw std::runtime_error("libcrypto has no cipher " + name);
}

void LinkCipher::seal(uint32_t tag, uint64_t number, const uint8_t* data, int64_t size, uint8_t* frame) {
  const LibCrypto& library = libcrypto();
  void* const context = context_.get();
  const Nonce nonce(tag, number);
  int written = 0;
  if (opens_ || size < 0 || size > kMostBytes || !library.encrypt.init(context, nullptr, nullptr, nullptr, nonce.bytes) ||
      (size && !library.encrypt.update(context, frame, &written, data, int(size))) || written != size ||
      !library.encrypt.final(context, frame + size, &written) || !library.control(context, kGetTag, kTagBytes, frame + size))
    throw std::runtime_error("libcrypto cannot seal a message");
}

bool LinkCipher::open(uint32_t tag, uint64_t number, const uint8_t* frame, int64_t size, uint8_t* into) {
  const LibCrypto& library = libcrypto();
  void* const context = context_.get();
  const Nonce nonce(tag, number);
  uint8_t end[kTagBytes], none;
  int written = 0;
  if (!opens_ || size < 0 || size > kMostBytes) return false;
  std::memcpy(end, frame + size, kTagBytes);
  if (library.decrypt.init(context, nullptr, nullptr, nullptr, nonce.bytes) && library.control(context, kSetTag, kTagBytes, end) &&
      (!size || library.decrypt.update(context, into, &written, frame, int(size))) && written == size &&
      library.decrypt.final(context, &none, &written) > 0)
    return true;
  if (size) std::memset(into, 0, size_t(size));  // nobody is to use what nobody vouches for
  return false;
}

}  // namespace tpimpi
