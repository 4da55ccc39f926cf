// tpimpi._native: hands NumPy's buffers to the kernels. It checks shapes and releases the GIL; see compute/backends/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "link_cipher.h"
#include "pack.h"
#include "session.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tpimpi;

namespace {

template <class... Traits>
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu, Traits...>;
using Result = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using KV = nb::ndarray<nb::ndim<4>, nb::device::cpu, nb::ro>;  // [pages, KV heads, page, row]
using Numbers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tables = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kMost = int64_t(1) << 28;  // rows, columns, positions: their products with a few bytes fit int64

void check(bool fits, const char* what) {
  if (!fits) throw nb::value_error(what);
}

const Level& level_called(const std::string& name) {
  int count;
  const Level* const* all = levels(&count);
  for (int i = 0; i < count; ++i)
    if (name.empty() || name == all[i]->name) return *all[i];
  throw nb::value_error(("this processor has no level " + name).c_str());
}

std::vector<std::string> level_names() {
  int count;
  const Level* const* all = levels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(all[i]->name);
  return names;
}

// Checks that `first` may be the place of a matrix's first column in its block.
void check_first(int format, int64_t first) {
  const int64_t block = quantized(Format(format)) ? group_units(Format(format)) * kBlock : 1;
  check(first == 0 || (block == 256 && first > 0 && first < block && first % kBlock == 0), "first is no place in a block of 256");
}

void linear(Session& session, int format, int64_t rows, int64_t columns, const Bytes& data, const Floats<nb::ndim<2>>& x,
            std::optional<Floats<nb::ndim<1>>> bias, const Result& y, int64_t first) {
  check(format >= 0 && format <= int(kLastFormat), "format is unknown");
  check(rows >= 0 && columns >= 1, "rows must be 0 or more, columns 1 or more");
  check(rows <= kMost && columns <= kMost && int64_t(x.shape(0)) <= kMost, "a size is beyond all measure");
  check_first(format, first);
  const Matrix w{Format(format), rows, columns, first, data.data()};
  check(int64_t(data.size()) == divided_up(rows, kPanelRows) * panel_bytes(w.format, columns, first), "weights have another size");
  check(int64_t(x.shape(1)) == columns, "x has another number of columns than the weights");
  check(y.ndim() == 2 && y.shape(0) == x.shape(0) && int64_t(y.shape(1)) == rows, "y must be [positions, rows]");
  check(!bias || int64_t(bias->size()) == rows, "bias must be [rows]");
  nb::gil_scoped_release free;
  session.linear(w, int64_t(x.shape(0)), x.data(), bias ? bias->data() : nullptr, y.data());
}

// The arrays of one call of `experts`, which lives as long as it does.
struct Arrays {
  std::vector<Bytes> bytes;
  std::vector<Floats<nb::ndim<1>>> floats;
  std::vector<nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>> rows;

  Matrix matrix(nb::handle from, int64_t rows, int64_t columns) {  // format, rows, columns, first, data
    const nb::tuple of = nb::cast<nb::tuple>(from);
    check(of.size() == 5, "a matrix must be (format, rows, columns, first, data)");
    const int format = nb::cast<int>(of[0]);
    check(format >= 0 && format <= int(kLastFormat), "format is unknown");
    Matrix w{Format(format), nb::cast<int64_t>(of[1]), nb::cast<int64_t>(of[2]), nb::cast<int64_t>(of[3]), nullptr};
    check(w.rows >= 1 && w.columns >= 1 && w.rows <= kMost && w.columns <= kMost, "a size is beyond all measure");
    check((rows < 0 || w.rows == rows) && w.columns == columns, "the matrices of an expert do not fit each other and x");
    check_first(format, w.first);
    bytes.push_back(nb::cast<Bytes>(of[4], false));
    check(int64_t(bytes.back().size()) == divided_up(w.rows, kPanelRows) * panel_bytes(w.format, w.columns, w.first),
          "weights have another size");
    w.data = bytes.back().data();
    return w;
  }
  const float* numbers(nb::handle from, int64_t size) {
    if (from.is_none()) return nullptr;
    floats.push_back(nb::cast<Floats<nb::ndim<1>>>(from, false));
    check(int64_t(floats.back().size()) == size, "a bias, or the weights of an expert's positions, have another size");
    return floats.back().data();
  }
};

void experts(Session& session, const Floats<nb::ndim<2>>& x, const nb::list& uses, int activation, float limit, const Result& out) {
  const int64_t n = int64_t(x.shape(0)), hidden = int64_t(x.shape(1));
  check(out.ndim() == 2 && out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1), "out must have the shape of x");
  check(activation >= 0 && activation <= int(Activation::Kind::clamped_silu), "activation is unknown");
  check(activation != int(Activation::Kind::clamped_silu) || limit > 0, "limit must be greater than 0");
  Arrays arrays;
  std::vector<Expert> all;
  for (const nb::handle use : uses) {  // gate, up, down or None; gate_bias, up_bias, down_bias; rows, weights
    const nb::tuple of = nb::cast<nb::tuple>(use);
    check(of.size() == 8, "an expert must have 8 parts");
    Expert e{};
    if (!of[0].is_none()) {
      e.gate = arrays.matrix(of[0], -1, hidden);
      e.up = arrays.matrix(of[1], e.gate.rows, hidden);
      e.down = arrays.matrix(of[2], hidden, e.gate.rows);
      e.gate_bias = arrays.numbers(of[3], e.gate.rows);
      e.up_bias = arrays.numbers(of[4], e.gate.rows);
    }
    e.down_bias = arrays.numbers(of[5], hidden);
    const auto& rows = arrays.rows.emplace_back(nb::cast<nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(of[6], false));
    e.rows = rows.data();
    e.count = int64_t(rows.size());
    e.weights = arrays.numbers(of[7], e.count);
    check(e.weights != nullptr, "the weights of an expert's positions are missing");
    for (int64_t i = 0; i < e.count; ++i) check(e.rows[i] >= 0 && e.rows[i] < n, "an expert's position is not there");
    all.push_back(e);
  }
  nb::gil_scoped_release free;
  session.experts(all, {Activation::Kind(activation), limit}, hidden, x.data(), out.data());
}

void rms_norm(Session& session, const Floats<>& x, const Floats<nb::ndim<1>>& weight, float eps, const Result& y) {
  check(x.ndim() > 0 && x.shape(x.ndim() - 1) == weight.size(), "x must be [..., size], weight [size]");
  check(y.size() == x.size(), "y must have the shape of x");
  const int64_t size = int64_t(weight.size());
  nb::gil_scoped_release free;
  session.rms_norm(size ? int64_t(x.size()) / size : 0, size, x.data(), weight.data(), eps, y.data());
}

void fixed_rms_norm(Session& session, const Floats<nb::ndim<2>>& x, const Floats<nb::ndim<1>>& weight, double eps, const Result& y) {
  check(x.shape(1) == weight.size() && weight.size() > 0, "x must be [n, size], weight [size]");
  check(y.size() == x.size(), "y must have the shape of x");
  nb::gil_scoped_release free;
  session.fixed_rms_norm(int64_t(x.shape(0)), int64_t(x.shape(1)), x.data(), weight.data(), eps, y.data());
}

void rope(Session& session, const Floats<nb::ndim<3>>& x, const Floats<nb::ndim<2>>& cos, const Floats<nb::ndim<2>>& sin,
          const Result& y) {
  check(cos.shape(0) == x.shape(0) && 2 * cos.shape(1) <= x.shape(2), "cos must be [n, half], of heads with 2 * half elements or more");
  check(sin.shape(0) == cos.shape(0) && sin.shape(1) == cos.shape(1), "sin must have the shape of cos");
  check(y.size() == x.size(), "y must have the shape of x");
  nb::gil_scoped_release free;
  session.rope(int64_t(x.shape(0)), int64_t(x.shape(1)), int64_t(x.shape(2)), 2 * int64_t(cos.shape(1)), x.data(), cos.data(),
               sin.data(), y.data());
}

template <void (Session::*activation)(int64_t, const float*, const float*, float*)>
void gated(Session& session, const Floats<>& gate, const Floats<>& up, const Result& y) {
  check(gate.size() == up.size() && gate.size() == y.size(), "gate, up and y must have one shape");
  nb::gil_scoped_release free;
  (session.*activation)(int64_t(gate.size()), gate.data(), up.data(), y.data());
}

void clamped_swiglu(Session& session, const Floats<>& gate, const Floats<>& up, float limit, const Result& y) {
  check(gate.size() == up.size() && gate.size() == y.size(), "gate, up and y must have one shape");
  check(limit > 0, "limit must be greater than 0");
  nb::gil_scoped_release free;
  session.clamped_swiglu(int64_t(gate.size()), limit, gate.data(), up.data(), y.data());
}

bool route(Session& session, const Floats<nb::ndim<2>>& x, const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>& router,
           const std::optional<Floats<nb::ndim<1>>>& bias, int bias_of, bool sigmoid, bool normalized, double scale,
           const nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& experts, const Result& weights) {
  const bool bf16 = router.dtype() == nb::dtype<uint16_t>();
  check(bf16 || router.dtype() == nb::dtype<float>(), "router must be f32, or the bits of bf16");
  check(router.shape(1) == x.shape(1), "x has another number of columns than the router");
  check(experts.shape(0) == x.shape(0) && weights.ndim() == 2 && weights.shape(0) == x.shape(0) && weights.shape(1) == experts.shape(1),
        "experts and weights must be [n, chosen]");
  check(experts.shape(1) >= 1 && experts.shape(1) <= router.shape(0), "chosen must be 1 or more, and no more than there are experts");
  check(bias_of >= 0 && bias_of <= int(Routing::Bias::choice), "bias_of is unknown");
  check(bias_of == int(Routing::Bias::none) || (bias && bias->size() == router.shape(0)), "bias must be [experts]");
  const Router rows{int64_t(router.shape(0)), int64_t(router.shape(1)), bf16, router.data()};
  const Routing routing{rows.experts, int64_t(experts.shape(1)), sigmoid, normalized, scale, Routing::Bias(bias_of), bias ? bias->data() : nullptr};
  nb::gil_scoped_release free;
  return session.route(rows, routing, int64_t(x.shape(0)), x.data(), experts.data(), weights.data());
}

// The form of k and v, which are laid out alike.
KVPages pages_of(const KV& k, const KV& v, int64_t head_dim) {
  const bool f16 = k.dtype() == nb::dlpack::dtype{uint8_t(nb::dlpack::dtype_code::Float), 16, 1};
  const bool q8_0 = k.dtype() == nb::dtype<uint8_t>();
  check(f16 || q8_0 || k.dtype() == nb::dtype<float>(), "k must be f32, f16, or the bytes of q8_0");
  check(v.dtype() == k.dtype(), "k and v must be of one type");
  for (int i = 0; i < 4; ++i) check(k.shape(i) == v.shape(i) && k.stride(i) == v.stride(i), "k and v must be laid out alike");
  check(k.stride(3) == 1 && k.stride(2) == int64_t(k.shape(3)), "the positions of a KV head must be contiguous in a page");
  check(int64_t(k.shape(2)) >= kLeastPage, "a page must have 16 positions or more");
  const int64_t size = q8_0 ? 1 : f16 ? 2 : 4;
  const KVPages pages{q8_0 ? Cached::q8_0 : f16 ? Cached::f16 : Cached::f32, head_dim, int64_t(k.shape(2)), k.stride(0) * size, k.stride(1) * size};
  check(head_dim >= 1 && (!q8_0 || head_dim % kBlock == 0), "head_dim must be 1 or more, of q8_0 a multiple of 32");
  check(int64_t(k.shape(3)) * size == cached_bytes(pages.format, head_dim), "keys and values must have head_dim numbers");
  return pages;
}

// The rows of a step, whose pages are there: all that an attention with this window reads (of 1: the rows' own).
KVRows rows_of(const Numbers& sequence, const Numbers& position, const Tables& tables, const KV& k, int64_t window) {
  const KVRows rows{int64_t(sequence.size()), sequence.data(), position.data(), tables.data(), int64_t(tables.shape(1))};
  check(sequence.size() == position.size(), "each row must have a sequence and a position");
  const int64_t page = int64_t(k.shape(2)), pages = int64_t(k.shape(0));
  for (int64_t row = 0; row < rows.n; ++row)
    check(rows.sequence[row] >= 0 && rows.sequence[row] < int64_t(tables.shape(0)), "a row's sequence is not there");
  for (Span span{0, 0}; span.last < rows.n;) {
    span = span_from(rows, span.last);
    int64_t first = kMost, last = 0;
    for (int64_t row = span.first; row < span.last; ++row) {
      const int64_t at = rows.position[row];
      check(at >= 0 && at < rows.table_size * page, "a row's position is in no page");
      first = std::min(first, window && at >= window ? at - window + 1 : 0);
      last = std::max(last, at);
    }
    for (int64_t i = first / page; i <= last / page; ++i) {
      const int64_t place = rows.table(span.first)[i];
      check(place >= 0 && place < pages, "a page that is to be read is not there");
    }
  }
  return rows;
}

void attention(Session& session, const Floats<nb::ndim<3>>& q, const KV& k, const KV& v, const Numbers& sequence, const Numbers& position,
               const Tables& tables, const std::vector<int64_t>& q_to_kv, int64_t window, float scale, float softcap,
               const std::optional<Floats<nb::ndim<1>>>& sinks, const Result& y) {
  check(window >= 0, "window may not be negative");
  const KVPages pages = pages_of(k, v, int64_t(q.shape(2)));
  const KVRows rows = rows_of(sequence, position, tables, k, window);
  check(rows.n == int64_t(q.shape(0)), "q must be [rows, heads, head_dim]");
  check(q_to_kv.size() == q.shape(1), "q_to_kv must name a KV head for each query head");
  for (int64_t head : q_to_kv) check(head >= 0 && head < int64_t(k.shape(1)), "q_to_kv names a KV head that is not there");
  check(softcap >= 0, "softcap may not be negative");
  check(!sinks || sinks->size() == q.shape(1), "sinks must be [heads]");
  check(y.size() == q.size(), "y must have the shape of q");
  const Attention a{rows, pages, int64_t(q.shape(1)), window, scale, softcap, q.data(), k.data(), v.data(), q_to_kv.data(),
                    sinks ? sinks->data() : nullptr, y.data()};
  nb::gil_scoped_release free;
  session.attention(a);
}

void store(Session& session, const Floats<nb::ndim<3>>& k, const Floats<nb::ndim<3>>& v, const KV& k_pages, const KV& v_pages,
           const Numbers& sequence, const Numbers& position, const Tables& tables, int64_t first_head) {
  const KVPages pages = pages_of(k_pages, v_pages, int64_t(k.shape(2)));
  const KVRows rows = rows_of(sequence, position, tables, k_pages, 1);
  for (int i = 0; i < 3; ++i) check(k.shape(i) == v.shape(i), "k and v must have one shape");
  check(rows.n == int64_t(k.shape(0)), "k must be [rows, heads, head_dim]");
  check(first_head >= 0 && first_head + int64_t(k.shape(1)) <= int64_t(k_pages.shape(1)), "a KV head is not there");
  nb::gil_scoped_release free;
  session.store(pages, rows, first_head, int64_t(k.shape(1)), k.data(), v.data(), static_cast<uint8_t*>(const_cast<void*>(k_pages.data())),
                static_cast<uint8_t*>(const_cast<void*>(v_pages.data())));
}

bool quantize(Session& session, int format, const Floats<nb::ndim<2>>& values,
              const nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& out) {
  check(format >= 0 && can_quantize(Format(format)), "format must be one that the kernels make");
  const int64_t weights = block_weights(Format(format)), blocks = int64_t(values.size()) / weights;
  check(int64_t(values.shape(1)) % weights == 0, "columns must be a multiple of the format's block");
  check(out.shape(0) == values.shape(0) && int64_t(out.size()) == blocks * block_bytes(Format(format)), "out has another size");
  nb::gil_scoped_release free;
  return session.quantize(Format(format), blocks, values.data(), out.data());
}

void pack_rows(int format, const nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>& stored, int64_t columns, int64_t first,
               const nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& out) {
  check(format >= 0 && format <= int(kLastFormat), "format is unknown");
  const int64_t rows = int64_t(stored.shape(0));
  check(columns >= 1 && rows <= kMost && columns <= kMost, "columns must be 1 or more, and sizes not beyond all measure");
  check_first(format, first);
  check(int64_t(stored.shape(1)) == row_bytes(Format(format), columns, first), "stored must be [rows, row_bytes]");
  check(stored.stride(1) == 1, "the bytes of a row must be contiguous");
  check(int64_t(out.size()) == divided_up(rows, kPanelRows) * panel_bytes(Format(format), columns, first), "out has another size");
  nb::gil_scoped_release free;
  pack(Format(format), rows, columns, first, stored.data(), stored.stride(0), out.data());
}

uint64_t read_all(Session& session, const Bytes& data) {
  nb::gil_scoped_release free;
  return session.read(data.data(), int64_t(data.size()));
}

double multiply_peak(Session& session, int format, double seconds) {
  check(format >= 0 && format <= int(kLastFormat), "format is unknown");
  nb::gil_scoped_release free;
  return session.multiply_peak(Format(format), seconds);
}

// A contiguous buffer of Python's, without the way through DLPack, for messages of some microseconds.
class Buffer {
 public:
  Buffer(nb::handle from, bool written) {
    if (PyObject_GetBuffer(from.ptr(), &view_, written ? PyBUF_WRITABLE : PyBUF_SIMPLE)) throw nb::python_error();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { PyBuffer_Release(&view_); }

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  int64_t size() const { return view_.len; }
  bool apart(const Buffer& other) const {
    return data() == other.data() || data() + size() <= other.data() || other.data() + other.size() <= data();
  }

 private:
  Py_buffer view_;
};

// Both hold the GIL: a cipher is used by one thread at a time.
void seal_message(LinkCipher& cipher, uint32_t tag, uint64_t number, nb::handle data, nb::handle frame) {
  const Buffer from(data, false), to(frame, true);
  check(!cipher.opens(), "this cipher opens messages");
  check(from.size() <= LinkCipher::kMostBytes && to.size() == from.size() + LinkCipher::kTagBytes, "frame has another size");
  check(from.apart(to), "data and frame overlap");
  cipher.seal(tag, number, from.data(), from.size(), to.data());
}

bool open_message(LinkCipher& cipher, uint32_t tag, uint64_t number, nb::handle frame, nb::handle into) {
  const Buffer from(frame, false), to(into, true);
  check(cipher.opens(), "this cipher seals messages");
  check(to.size() <= LinkCipher::kMostBytes && from.size() == to.size() + LinkCipher::kTagBytes, "into has another size");
  check(from.apart(to), "frame and into overlap");
  return cipher.open(tag, number, from.data(), to.size(), to.data());
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a run that ends by an error leaves while its readers still hold what they hold
  m.def("levels", &level_names, "Levels (instruction sets) that this build has and this processor runs, best first.");
  m.def("pack", &pack_rows, "format"_a, "stored"_a.noconvert(), "columns"_a, "first"_a, "out"_a.noconvert(),
        "Rows in row form, uint8 [rows, row_bytes], in packed form into out; see pack.h.");
  nb::class_<LinkCipher>(m, "LinkCipher", "See link_cipher.h.")
      .def("__init__", [](LinkCipher* self, const std::string& name, const nb::bytes& key, bool opens) {
             check(int64_t(key.size()) == LinkCipher::kKeyBytes, "key must have 32 bytes");
             new (self) LinkCipher(name, static_cast<const uint8_t*>(key.data()), opens);
           }, "name"_a, "key"_a, "opens"_a)
      .def("seal", &seal_message, "tag"_a, "number"_a, "data"_a, "frame"_a)
      .def("open", &open_message, "tag"_a, "number"_a, "frame"_a, "into"_a, "False where it is not what was sealed.");
  nb::class_<Session>(m, "Session")
      .def("__init__", [](Session* self, const std::string& level, int threads) {
             check(threads >= 1, "threads must be 1 or more");
             new (self) Session(level_called(level), threads);
           }, "level"_a, "threads"_a)
      .def_prop_ro("level", [](const Session& self) { return std::string(self.level().name); })
      .def_prop_ro("threads", &Session::threads)
      .def("linear", &linear, "format"_a, "rows"_a, "columns"_a, "data"_a, "x"_a, "bias"_a.none(), "y"_a.noconvert(),
           "first"_a = 0)
      .def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "y"_a.noconvert())
      .def("fixed_rms_norm", &fixed_rms_norm, "x"_a, "weight"_a, "eps"_a, "y"_a.noconvert())
      .def("rope", &rope, "x"_a, "cos"_a, "sin"_a, "y"_a.noconvert())
      .def("swiglu", &gated<&Session::swiglu>, "gate"_a, "up"_a, "y"_a.noconvert())
      .def("geglu", &gated<&Session::geglu>, "gate"_a, "up"_a, "y"_a.noconvert())
      .def("clamped_swiglu", &clamped_swiglu, "gate"_a, "up"_a, "limit"_a, "y"_a.noconvert())
      .def("route", &route, "x"_a, "router"_a.noconvert(), "bias"_a.none(), "bias_of"_a, "sigmoid"_a, "normalized"_a, "scale"_a,
           "experts"_a.noconvert(), "weights"_a.noconvert(), "False where a logit is not finite.")
      .def("experts", &experts, "x"_a, "uses"_a, "activation"_a, "limit"_a, "out"_a.noconvert())
      .def("attention", &attention, "q"_a, "k"_a, "v"_a, "sequence"_a.noconvert(), "position"_a.noconvert(), "tables"_a.noconvert(),
           "q_to_kv"_a, "window"_a, "scale"_a, "softcap"_a, "sinks"_a.none(), "y"_a.noconvert())
      .def("store", &store, "k"_a, "v"_a, "k_pages"_a.noconvert(), "v_pages"_a.noconvert(), "sequence"_a.noconvert(),
           "position"_a.noconvert(), "tables"_a.noconvert(), "first_head"_a)
      .def("quantize", &quantize, "format"_a, "values"_a, "out"_a.noconvert(), "False where a value is not finite.")
      .def("read", &read_all, "data"_a, "Read data (whole pieces of 256 bytes) with all threads, and return the sum of its 8-byte words.")
      .def("multiply_peak", &multiply_peak, "format"_a, "seconds"_a,
           "Operations a second (a product and a sum are two) of one thread that multiplies numbers in registers.");
}
