#include "link_cipher.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace tpimpi {
namespace {

// What is used of libcrypto, the same in its versions 1.1 and 3; see EVP_EncryptInit(3). Its headers need not be installed.
struct LibCrypto {
  void* (*new_context)();
  void (*free_context)(void*);
  const void* (*aes_256_gcm)();
  const void* (*chacha20_poly1305)();
  int (*control)(void* context, int command, int size, void* value);
  void (*clear_errors)();
  struct {
    int (*init)(void* context, const void* cipher, void* engine, const uint8_t* key, const uint8_t* nonce);
    int (*update)(void* context, uint8_t* out, int* written, const uint8_t* in, int size);
    int (*final)(void* context, uint8_t* out, int* written);
  } encrypt, decrypt;
};
constexpr int kGetTag = 0x10, kSetTag = 0x11;  // EVP_CTRL_AEAD_GET_TAG, EVP_CTRL_AEAD_SET_TAG

template <class Function>
bool find(void* library, const char* name, Function& function) {
  return (function = reinterpret_cast<Function>(dlsym(library, name)));
}

bool find_all(void* library, LibCrypto& of) {
  return find(library, "EVP_CIPHER_CTX_new", of.new_context) && find(library, "EVP_CIPHER_CTX_free", of.free_context) &&
         find(library, "EVP_aes_256_gcm", of.aes_256_gcm) && find(library, "EVP_chacha20_poly1305", of.chacha20_poly1305) &&
         find(library, "EVP_CIPHER_CTX_ctrl", of.control) && find(library, "ERR_clear_error", of.clear_errors) &&
         find(library, "EVP_EncryptInit_ex", of.encrypt.init) && find(library, "EVP_EncryptUpdate", of.encrypt.update) &&
         find(library, "EVP_EncryptFinal_ex", of.encrypt.final) && find(library, "EVP_DecryptInit_ex", of.decrypt.init) &&
         find(library, "EVP_DecryptUpdate", of.decrypt.update) && find(library, "EVP_DecryptFinal_ex", of.decrypt.final);
}

// The one that Python has loaded, of whatever version and folder, before another is. Linux alone: macOS would look for such a
// name in the current folder too.
const LibCrypto& libcrypto() {
  static const LibCrypto found = [] {
    LibCrypto of;
    for (const int loaded : {RTLD_NOLOAD, 0})
      for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"})
        if (void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL | loaded); library && find_all(library, of)) return of;
    throw std::runtime_error("there is no libcrypto");
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
  if (!context_ || !cipher || !init(context_.get(), cipher, nullptr, key, nullptr)) {
    library.clear_errors();
    throw std::runtime_error("libcrypto has no cipher " + name);
  }
}

void LinkCipher::seal(uint32_t tag, uint64_t number, const uint8_t* data, int64_t size, uint8_t* frame) {
  const LibCrypto& library = libcrypto();
  void* const context = context_.get();
  const Nonce nonce(tag, number);
  int written = 0;
  if (!library.encrypt.init(context, nullptr, nullptr, nullptr, nonce.bytes) ||
      (size && !library.encrypt.update(context, frame, &written, data, int(size))) || written != size ||
      !library.encrypt.final(context, frame + size, &written) || !library.control(context, kGetTag, kTagBytes, frame + size)) {
    library.clear_errors();
    throw std::runtime_error("libcrypto cannot seal a message");
  }
}

bool LinkCipher::open(uint32_t tag, uint64_t number, const uint8_t* frame, int64_t size, uint8_t* into) {
  const LibCrypto& library = libcrypto();
  void* const context = context_.get();
  const Nonce nonce(tag, number);
  uint8_t end[kTagBytes], none;
  int written = 0;
  std::memcpy(end, frame + size, kTagBytes);
  if (library.decrypt.init(context, nullptr, nullptr, nullptr, nonce.bytes) && library.control(context, kSetTag, kTagBytes, end) &&
      (!size || library.decrypt.update(context, into, &written, frame, int(size))) && written == size &&
      library.decrypt.final(context, &none, &written) > 0)
    return true;
  library.clear_errors();
  if (size) std::memset(into, 0, size_t(size));  // nobody is to use what nobody vouches for
  return false;
}

}  // namespace tpimpi
