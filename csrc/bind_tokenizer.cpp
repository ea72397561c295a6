// Python's side of csrc/bpe and csrc/pretokenize: conversions, the GIL, errors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "bind_text.h"
#include "bpe.h"
#include "bpe_train.h"
#include "pretokenize.h"

namespace py = pybind11;
using pretokenize::Pattern;

namespace {

std::string_view view(const py::handle& object) {
    char* data;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(object.ptr(), &data, &size)) throw py::error_already_set();
    return {data, static_cast<size_t>(size)};
}

// The list keeps the bytes alive, so the views hold as long as it does.
std::vector<std::string_view> views(const py::list& list) {
    std::vector<std::string_view> out;
    out.reserve(list.size());
    for (py::handle item : list) out.push_back(view(item));
    return out;
}

// The bytes of a str or of bytes, without a copy where that can be. Surrogate pairs in a str are joined and lone
// surrogates become U+FFFD, as tiktoken does.
class TextView {
public:
    explicit TextView(py::handle object) {
        if (PyBytes_Check(object.ptr())) {
            text_ = {PyBytes_AS_STRING(object.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(object.ptr()))};
            return;
        }
        if (!PyUnicode_Check(object.ptr()))
            throw py::value_error("Tokenizer: expected str or bytes, got " + std::string(Py_TYPE(object.ptr())->tp_name));
        if (read(object)) return;
        PyErr_Clear();
        py::object wide = take(PyUnicode_AsEncodedString(object.ptr(), "utf-16-le", "surrogatepass"));
        repaired_ = take(PyUnicode_Decode(PyBytes_AS_STRING(wide.ptr()), PyBytes_GET_SIZE(wide.ptr()), "utf-16-le", "replace"));
        if (!read(repaired_)) throw py::error_already_set();
    }
    std::string_view get() const { return text_; }
    bool repaired() const { return static_cast<bool>(repaired_); }

private:
    std::string_view text_;
    py::object repaired_;

    bool read(py::handle text) {
        Py_ssize_t size;
        const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
        if (data) text_ = {data, static_cast<size_t>(size)};
        return data != nullptr;
    }
    static py::object take(PyObject* made) {
        if (!made) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(made);
    }
};

// The texts of any iterable of str and bytes; `keep` holds what the views need.
std::vector<std::string_view> text_views(const py::iterable& texts, std::vector<py::object>& keep) {
    std::vector<std::string_view> out;
    const bool lasting = PyList_Check(texts.ptr()) || PyTuple_Check(texts.ptr());
    if (lasting) keep.push_back(py::tuple(texts));  // all at once: a list may change while its texts are encoded
    for (py::handle item : lasting ? py::handle(keep.back()) : py::handle(texts)) {
        TextView text(item);
        out.push_back(text.get());
        if (text.repaired()) keep.push_back(py::bytes(text.get().data(), text.get().size()));
        else if (!lasting) keep.push_back(py::reinterpret_borrow<py::object>(item));
        if (text.repaired()) out.back() = view(keep.back());
    }
    return out;
}

constexpr size_t kShortText = 4096;  // bytes that take less time than handing over the interpreter's lock

// A vocabulary with its split rule. Lists of ids share one int object a token.
class Codec {
public:
    Codec(const py::list& tokens, const std::vector<uint32_t>& specials,
          const std::vector<std::pair<uint32_t, uint32_t>>& merges, const std::vector<uint32_t>& results, bool by_bytes,
          bool whole_piece_first, const std::string& pattern)
        : pattern_(pattern.empty() ? Pattern::gpt2 : pretokenize::pattern_of(pattern.c_str())) {
        const std::vector<std::string_view> bytes = views(tokens);
        std::vector<bpe::Kind> kinds;
        for (std::string_view b : bytes) kinds.push_back(b.empty() ? bpe::Kind::absent : bpe::Kind::ordinary);
        for (uint32_t id : specials) kinds.at(id) = bpe::Kind::special;
        std::vector<bpe::Merge> ranked;
        for (size_t i = 0; i < merges.size(); i++) ranked.push_back({merges[i].first, merges[i].second, results[i]});
        model_ = std::make_unique<bpe::Model>(bytes, std::move(kinds), ranked, by_bytes, whole_piece_first);
    }
    Codec(const Codec&) = delete;
    ~Codec() {
        for (PyObject* value : ints_) Py_XDECREF(value);
    }

    py::list encode(py::handle text, const py::list& specials) {
        const TextView bytes(text);
        std::vector<bpe::Special> allowed;
        for (py::handle item : specials) {
            auto pair = py::cast<py::tuple>(item);
            allowed.push_back({view(pair[0]), py::cast<uint32_t>(pair[1])});
        }
        bpe::Model::Lease cache(*model_);
        bpe::Ids& ids = cache->ids;
        ids.clear();
        if (bytes.get().size() <= kShortText) {
            model_->encode(pattern_, bytes.get(), allowed, *cache, ids);
        } else {
            py::gil_scoped_release release;
            model_->encode(pattern_, bytes.get(), allowed, *cache, ids);
        }
        return int_list(ids.data(), ids.size());
    }

    // The ids of a text in which nothing is special.
    py::list encode_plain(py::handle text) {
        const TextView bytes(text);
        bpe::Model::Lease cache(*model_);
        bpe::Ids& ids = cache->ids;
        ids.clear();
        if (bytes.get().size() <= kShortText) {
            model_->encode(pattern_, bytes.get(), {}, *cache, ids);
        } else {
            py::gil_scoped_release release;
            model_->encode(pattern_, bytes.get(), {}, *cache, ids);
        }
        return int_list(ids.data(), ids.size());
    }

    py::list encode_pieces(const py::list& pieces) {
        auto all = views(pieces);
        bpe::Ids ids;
        {
            py::gil_scoped_release release;
            for (std::string_view p : all) model_->encode_piece(reinterpret_cast<const uint8_t*>(p.data()), p.size(), ids);
        }
        return int_list(ids.data(), ids.size());
    }

    py::tuple encode_batch(const py::iterable& texts, int threads) {
        std::vector<int64_t> offsets;
        auto ids = std::make_unique<bpe::Ids>(batch(texts, threads, offsets));
        const auto size = static_cast<py::ssize_t>(ids->size());
        auto* data = reinterpret_cast<int32_t*>(ids->data());
        py::capsule owner(ids.release(), [](void* held) { delete static_cast<bpe::Ids*>(held); });
        return py::make_tuple(py::array_t<int32_t>(size, data, owner),
                              py::array_t<int64_t>(static_cast<py::ssize_t>(offsets.size()), offsets.data()));
    }

    py::list encode_lists(const py::iterable& texts, int threads) {
        std::vector<int64_t> offsets;
        bpe::Ids ids = batch(texts, threads, offsets);
        py::list out(offsets.size() - 1);
        for (size_t i = 0; i + 1 < offsets.size(); i++)
            PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i),
                            int_list(ids.data() + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i])).release().ptr());
        return out;
    }

    // ids: a list or tuple of int, or an array.
    py::bytes decode_bytes(py::handle ids) const {
        bpe::Model::Lease cache(*model_);
        std::string_view text = decoded(ids, cache->bytes);
        return py::bytes(text.data(), text.size());
    }

    py::str decode(py::handle ids) const {
        bpe::Model::Lease cache(*model_);
        return text::make_str(decoded(ids, cache->bytes));
    }

private:
    Pattern pattern_;
    std::unique_ptr<bpe::Model> model_;
    std::vector<PyObject*> ints_;  // made when the first list is asked for

    bpe::Ids batch(const py::iterable& texts, int threads, std::vector<int64_t>& offsets) {
        std::vector<py::object> keep;
        auto all = text_views(texts, keep);
        py::gil_scoped_release release;
        return model_->encode_batch(pattern_, all, threads, offsets);
    }

    py::list int_list(const uint32_t* ids, size_t n) {
        if (ints_.empty()) {
            ints_.reserve(model_->size());
            for (size_t id = 0; id < model_->size(); id++) {
                ints_.push_back(PyLong_FromSize_t(id));
                if (!ints_.back()) throw py::error_already_set();
            }
        }
        PyObject* list = PyList_New(static_cast<Py_ssize_t>(n));
        if (!list) throw py::error_already_set();
        PyObject** to = reinterpret_cast<PyListObject*>(list)->ob_item;
        for (size_t i = 0; i < n; i++) {
            PyObject* value = ints_[ids[i]];
            Py_INCREF(value);
            to[i] = value;
        }
        return py::reinterpret_steal<py::list>(list);
    }

    template <class Id>
    void decode_more(const Id* ids, size_t n, bpe::Bytes& text) const {
        try {
            if (n <= kShortText) {
                model_->decode(ids, n, text);
            } else {
                py::gil_scoped_release release;
                model_->decode(ids, n, text);
            }
        } catch (const std::out_of_range& error) {
            throw py::key_error(error.what());
        }
    }

    template <class Id>
    std::string_view decoded_ids(const Id* ids, py::ssize_t n, bpe::Bytes& text) const {
        text.clear();
        decode_more(ids, static_cast<size_t>(n), text);
        return {text.data(), text.size()};
    }

    // An int of any size; one that is too large is no id, as -1 is none.
    static int64_t int_of(PyObject* item) {
        int overflow = 0;
        const int64_t value = PyLong_AsLongLongAndOverflow(item, &overflow);
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        if (overflow)
            throw py::key_error("Tokenizer.decode: expected ids of the vocabulary, got " + std::string(py::str(py::handle(item))));
        return value;
    }

    // The value of an item that is not plainly an int, whose __index__ may run anything. Returns where the items then are.
    [[gnu::noinline]] static PyObject** index_of(py::handle ids, size_t n, size_t i, int64_t& value) {
        const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_ITEMS(ids.ptr())[i]);
        if (!PyIndex_Check(item.ptr()))
            throw py::value_error("Tokenizer.decode: expected integer ids, got " + std::string(Py_TYPE(item.ptr())->tp_name));
        value = int_of(item.ptr());
        if (static_cast<size_t>(PySequence_Fast_GET_SIZE(ids.ptr())) != n)
            throw py::value_error("Tokenizer.decode: expected ids that stay as they are, got a list that changed");
        return PySequence_Fast_ITEMS(ids.ptr());
    }

    std::string_view decoded(py::handle ids, bpe::Bytes& text) const {
        if (PyList_Check(ids.ptr()) || PyTuple_Check(ids.ptr())) {
            const auto n = static_cast<size_t>(PySequence_Fast_GET_SIZE(ids.ptr()));
            PyObject** items = PySequence_Fast_ITEMS(ids.ptr());
            text.clear();
            int64_t block[1024];
            for (size_t first = 0; first < n; first += std::size(block)) {
                const size_t count = std::min(n - first, std::size(block));
                for (size_t i = 0; i < count; i++) {
                    if (__builtin_expect(!PyLong_CheckExact(items[first + i]), 0)) items = index_of(ids, n, first + i, block[i]);
                    else block[i] = int_of(items[first + i]);
                }
                decode_more(block, count, text);
            }
            return {text.data(), text.size()};
        }
        auto array = py::array::ensure(ids);
        if (!array || (array.size() && array.dtype().kind() != 'i' && array.dtype().kind() != 'u'))
            throw py::value_error("Tokenizer.decode: expected integer ids, got " +
                                  std::string(array ? py::str(array.dtype()) : py::str(Py_TYPE(ids.ptr())->tp_name)));
        if (py::isinstance<py::array_t<int32_t, py::array::c_style>>(array))
            return decoded_ids(static_cast<const int32_t*>(array.data()), array.size(), text);
        auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
        if (!wide) throw py::error_already_set();
        return decoded_ids(wide.data(), wide.size(), text);
    }
};

// A call with one text goes straight to the codec; any other to `otherwise`. A function of Python's own making and pybind11's
// dispatch would together take as long as the encoding of a short prompt.
PyObject* direct_encode(PyObject* self, PyObject* const* args, Py_ssize_t n_args, PyObject* names) {
    if (n_args != 1 || names) return PyObject_Vectorcall(PyTuple_GET_ITEM(self, 2), args, static_cast<size_t>(n_args), names);
    try {
        auto* codec = static_cast<Codec*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(self, 0), nullptr));
        return codec->encode_plain(args[0]).release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

py::object direct_encoder(const py::object& codec, const py::object& otherwise) {
    static PyMethodDef definition = {"encode", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(direct_encode)),
                                     METH_FASTCALL | METH_KEYWORDS, "The ids of a text; see Tokenizer.encode."};
    py::tuple self = py::make_tuple(py::capsule(codec.cast<Codec*>()), codec, otherwise);
    return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

// Lines of base64, a space and a rank. Returns (tokens by rank, number of the first line that is something else or 0).
py::tuple read_ranks(const py::bytes& file) {
    static const auto values = [] {
        std::array<int8_t, 256> table;
        table.fill(-1);
        const char* alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        for (int8_t i = 0; i < 64; i++) table[static_cast<uint8_t>(alphabet[i])] = i;
        return table;
    }();
    std::string_view text = view(file);
    std::vector<std::pair<size_t, std::string>> found;
    size_t number = 0;
    while (!text.empty()) {
        number++;
        const size_t end = std::min(text.find('\n'), text.size());
        std::string_view line = text.substr(0, end);
        text.remove_prefix(std::min(end + 1, text.size()));
        if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
        if (line.empty()) continue;
        const size_t space = line.find(' ');
        std::string token;
        size_t rank = 0;
        bool good = space != std::string_view::npos && space % 4 == 0 && space > 0 && space + 1 < line.size() &&
                    line.size() - space < 10;
        for (size_t i = 0; good && i < space; i += 4) {
            const size_t padding = i + 4 == space ? (line[i + 3] == '=') + (line[i + 3] == '=' && line[i + 2] == '=') : 0;
            uint32_t bits = 0;
            for (size_t k = 0; k < 4; k++) {
                const int8_t value = k + padding < 4 ? values[static_cast<uint8_t>(line[i + k])] : int8_t{0};
                good = good && value >= 0;
                bits = bits << 6 | (static_cast<uint32_t>(value) & 63);
            }
            for (size_t k = 0; k + padding < 3; k++) token.push_back(static_cast<char>(bits >> (16 - 8 * k)));
        }
        for (size_t i = space + 1; good && i < line.size(); i++) {
            good = line[i] >= '0' && line[i] <= '9';
            rank = 10 * rank + static_cast<size_t>(line[i] - '0');
        }
        if (!good || rank >= bpe::RankTable::kLimit) return py::make_tuple(py::list(), number);
        found.emplace_back(rank, std::move(token));
    }
    size_t size = 0;
    for (const auto& [rank, token] : found) size = std::max(size, rank + 1);
    py::list tokens(size);
    for (size_t i = 0; i < size; i++) PyList_SET_ITEM(tokens.ptr(), static_cast<Py_ssize_t>(i), py::bytes("").release().ptr());
    for (const auto& [rank, token] : found) tokens[rank] = py::bytes(token);
    return py::make_tuple(tokens, 0);
}

py::list pieces_of(const std::string& pattern, const py::bytes& text, const std::string& isa) {
    std::string_view bytes = view(text);
    pretokenize::Splitter splitter(pretokenize::pattern_of(pattern.c_str()), bytes, isa);
    size_t ends[pretokenize::Splitter::kRoom], start = 0;
    py::list out;
    while (size_t count = splitter.next(ends))
        for (size_t i = 0; i < count; start = ends[i++]) out.append(py::bytes(bytes.data() + start, ends[i] - start));
    return out;
}

size_t safe_cut(const py::bytes& text, size_t from) {
    std::string_view bytes = view(text);
    return pretokenize::safe_cut(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), from);
}

size_t last_safe_cut(const py::bytes& text) {
    std::string_view bytes = view(text);
    return pretokenize::last_safe_cut(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

// The corpus as it is counted, then the merges, some at a time so that the caller can show them, or stop.
class Training {
public:
    explicit Training(int threads) : counter_(threads) {}

    void add(const std::string& pattern, const py::list& texts) {
        auto all = views(texts);
        py::gil_scoped_release release;
        counter_.add(pretokenize::pattern_of(pattern.c_str()), all);
    }
    void add_pieces(const py::list& pieces) {
        auto all = views(pieces);
        py::gil_scoped_release release;
        counter_.add_pieces(all);
    }
    size_t finish(int tie_break) {
        py::gil_scoped_release release;
        bpe::PieceTable pieces = counter_.finish();
        trainer_ = std::make_unique<bpe::Trainer>(pieces, static_cast<bpe::TieBreak>(tie_break));
        return pieces.size();
    }
    std::vector<std::pair<uint32_t, uint32_t>> merges(size_t n) {
        if (!trainer_) throw std::runtime_error("BpeTraining.merges: finish() comes first");
        py::gil_scoped_release release;
        std::vector<std::pair<uint32_t, uint32_t>> out;
        for (bpe::TrainedPair p : trainer_->next(n)) out.emplace_back(p.left, p.right);
        return out;
    }

private:
    bpe::PieceCounter counter_;
    std::unique_ptr<bpe::Trainer> trainer_;
};

}  // namespace

void bind_tokenizer(py::module_& m) {
    m.def("pretokenize", &pieces_of,
          "The pieces of UTF-8 text (bytes) under a named pattern; isa: portable, avx2 or avx512, which this CPU must offer.",
          py::arg("pattern"), py::arg("text"), py::arg("isa") = "");
    m.def("direct_encoder", &direct_encoder, "A function encode(text) of a BpeModel; any other call goes to `otherwise`.");
    m.def("read_ranks", &read_ranks, "(tokens by rank, 0) of a .tiktoken file's bytes, or ([], number of a line that is none).");
    m.def("safe_cut", &safe_cut, "Where UTF-8 text (bytes) may be cut, at or after a position; its size if nowhere.");
    m.def("code_point_class", &pretokenize::class_of, "The class bits of a code point; see unicode_tables.h.");
    m.def("last_safe_cut", &last_safe_cut, "The last such place; 0 if there is none but the beginning.");
    py::class_<Training>(m, "BpeTraining", "Counts the pieces of a corpus, then finds the merges.")
        .def(py::init<int>(), py::arg("threads"))
        .def("add", &Training::add, "Count the pieces of a list of texts (bytes).")
        .def("add_pieces", &Training::add_pieces, "Count pieces (bytes) that are split already.")
        .def("finish", &Training::finish, "End the counting; tie_break is 0 for hf, 1 for raw, 2 for first. Returns the "
             "number of distinct pieces.")
        .def("merges", &Training::merges, "The next merges, at most n; fewer when there are no more.");
    py::class_<Codec>(m, "BpeModel", "Encodes and decodes with a fixed vocabulary.")
        .def(py::init<const py::list&, const std::vector<uint32_t>&, const std::vector<std::pair<uint32_t, uint32_t>>&,
                      const std::vector<uint32_t>&, bool, bool, const std::string&>(),
             py::arg("tokens"), py::arg("specials"), py::arg("merges"), py::arg("results"), py::arg("by_bytes"),
             py::arg("whole_piece_first"), py::arg("pattern"),
             "tokens: bytes by id, empty where there is none. With by_bytes the merges come from the tokens. pattern: a "
             "name that pretokenize knows, or empty if only pieces will be encoded.")
        .def("encode", &Codec::encode, "Ids of one text; specials is a list of (bytes, id) to parse.")
        .def("encode_pieces", &Codec::encode_pieces, "Ids of pieces (bytes) that are split already.")
        .def("encode_batch", &Codec::encode_batch, "(ids int32, offsets int64) of texts.")
        .def("encode_lists", &Codec::encode_lists, "A list of ids for each text.")
        .def("decode", &Codec::decode, "The text of ids. KeyError for an unknown id.")
        .def("decode_bytes", &Codec::decode_bytes, "The bytes of ids. KeyError for an unknown id.");
}
