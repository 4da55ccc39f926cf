// The cipher of one direction of a link between two ranks, by the library of OpenSSL (libcrypto) that is loaded when it is first
// needed; see star/ciphers.py. It is kept with its key: through a library that sets up each message anew, what costs is the way
// there, as between two messages of a run the weights push code and keys out of the caches.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace tpimpi {

class LinkCipher {
 public:
  static constexpr int64_t kKeyBytes = 32, kTagBytes = 16;
  static constexpr int64_t kMostBytes = (int64_t(1) << 31) - 1;  // of one message: libcrypto counts them by an int

  // `name` is AES-256-GCM or ChaCha20-Poly1305. Throws std::runtime_error where there is no libcrypto, or it has not that cipher.
  LinkCipher(const std::string& name, const uint8_t* key, bool opens);

  bool opens() const { return opens_; }

  // Both, of one that seals and of one that opens, with size at most kMostBytes: the nonce is the tag (4 bytes) and the number
  // (8), little-endian. What is read and what is written begin at the same place, or do not overlap.
  // data [size] into frame [size + kTagBytes]. Throws std::runtime_error.
  void seal(uint32_t tag, uint64_t number, const uint8_t* data, int64_t size, uint8_t* frame);
  // frame [size + kTagBytes] into `into` [size]; false, and zeros, where it is not what was sealed.
  bool open(uint32_t tag, uint64_t number, const uint8_t* frame, int64_t size, uint8_t* into);

 private:
  std::unique_ptr<void, void (*)(void*)> context_;
  bool opens_;
};

}  // namespace tpimpi
