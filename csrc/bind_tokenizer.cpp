// Python's side of csrc/bpe and csrc/pretokenize: conversions, the GIL, errors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

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

py::list int_list(const std::vector<uint32_t>& ids) {
    py::list list(ids.size());
    for (size_t i = 0; i < ids.size(); i++) {
        PyObject* value = PyLong_FromUnsignedLong(ids[i]);
        if (!value) throw py::error_already_set();
        PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), value);
    }
    return list;
}

std::unique_ptr<bpe::Model> make_model(const py::list& tokens, const std::vector<uint32_t>& specials,
                                       const std::vector<std::pair<uint32_t, uint32_t>>& merges,
                                       const std::vector<uint32_t>& results, bool by_bytes, bool whole_piece_first) {
    std::vector<std::string> bytes;
    for (std::string_view t : views(tokens)) bytes.emplace_back(t);
    std::vector<bpe::Kind> kinds;
    for (const std::string& b : bytes) kinds.push_back(b.empty() ? bpe::Kind::absent : bpe::Kind::ordinary);
    for (uint32_t id : specials) kinds.at(id) = bpe::Kind::special;
    std::vector<bpe::Merge> ranked;
    for (uint32_t i = 0; i < merges.size(); i++) ranked.push_back({merges[i].first, merges[i].second, results[i], i});
    if (by_bytes) ranked = bpe::Model::all_splits(bytes, kinds);
    return std::make_unique<bpe::Model>(std::move(bytes), std::move(kinds), ranked, whole_piece_first);
}

py::list encode(const bpe::Model& model, const std::string& pattern, const py::bytes& text, const py::list& specials) {
    std::string_view bytes = view(text);
    std::vector<bpe::Special> allowed;
    for (py::handle item : specials) {
        auto pair = py::cast<py::tuple>(item);
        allowed.push_back({view(pair[0]), py::cast<uint32_t>(pair[1])});
    }
    std::vector<uint32_t> ids;
    {
        py::gil_scoped_release release;
        model.encode(pretokenize::pattern_of(pattern.c_str()), bytes, allowed, ids);
    }
    return int_list(ids);
}

py::list encode_pieces(const bpe::Model& model, const py::list& pieces) {
    auto all = views(pieces);
    std::vector<uint32_t> ids;
    {
        py::gil_scoped_release release;
        for (std::string_view p : all) model.encode_piece(reinterpret_cast<const uint8_t*>(p.data()), p.size(), ids);
    }
    return int_list(ids);
}

py::tuple encode_batch(const bpe::Model& model, const std::string& pattern, const py::list& texts, int threads) {
    auto all = views(texts);
    bpe::Model::Batch batch;
    {
        py::gil_scoped_release release;
        batch = model.encode_batch(pretokenize::pattern_of(pattern.c_str()), all, threads);
    }
    py::array_t<int32_t> ids(batch.offsets.back());
    int32_t* to = ids.mutable_data();
    {
        py::gil_scoped_release release;
        for (const auto& part : batch.parts) to = std::copy(part.begin(), part.end(), to);
    }
    py::array_t<int64_t> offsets(static_cast<py::ssize_t>(batch.offsets.size()), batch.offsets.data());
    return py::make_tuple(ids, offsets);
}

py::bytes decode(const bpe::Model& model, const py::array_t<int64_t, py::array::c_style>& ids) {
    std::string text;
    try {
        py::gil_scoped_release release;
        text = model.decode(ids.data(), static_cast<size_t>(ids.size()));
    } catch (const std::out_of_range& error) {
        throw py::key_error(error.what());
    }
    return py::bytes(text);
}

py::list pieces_of(const std::string& pattern, const py::bytes& text) {
    std::string_view bytes = view(text);
    py::list out;
    Pattern rule = pretokenize::pattern_of(pattern.c_str());
    pretokenize::for_each_piece(
        rule, reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(),
        [&](const uint8_t* p, size_t n) { out.append(py::bytes(reinterpret_cast<const char*>(p), n)); });
    return out;
}

size_t safe_cut(const py::bytes& text, size_t from) {
    std::string_view bytes = view(text);
    return pretokenize::safe_cut(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), from);
}

// The corpus as it is counted, then the merges.
class Training {
public:
    explicit Training(int threads) : threads_(threads) {}

    void add(const std::string& pattern, const py::list& texts) {
        auto all = views(texts);
        py::gil_scoped_release release;
        counter_.add(pretokenize::pattern_of(pattern.c_str()), all, threads_);
    }
    void add_files(const std::string& pattern, const std::vector<std::string>& paths) {
        py::gil_scoped_release release;
        counter_.add_files(pretokenize::pattern_of(pattern.c_str()), paths, threads_);
    }
    void add_pieces(const py::list& pieces) {
        auto all = views(pieces);
        py::gil_scoped_release release;
        counter_.add_pieces(all);
    }
    std::vector<std::pair<uint32_t, uint32_t>> merges(size_t n_merges, int tie_break) {
        py::gil_scoped_release release;
        std::vector<std::pair<uint32_t, uint32_t>> out;
        for (bpe::TrainedPair p : bpe::train(counter_, n_merges, static_cast<bpe::TieBreak>(tie_break)))
            out.emplace_back(p.left, p.right);
        return out;
    }
    size_t size() const { return counter_.size(); }

private:
    int threads_;
    bpe::PieceCounter counter_;
};

}  // namespace

void bind_tokenizer(py::module_& m) {
    m.def("pretokenize", &pieces_of, "The pieces of UTF-8 text (bytes) under a named pattern.", py::arg("pattern"),
          py::arg("text"));
    m.def("safe_cut", &safe_cut, "Where UTF-8 text (bytes) may be cut, at or after a position; its size if nowhere.");
    m.def("code_point_class", &pretokenize::class_of, "The class bits of a code point; see unicode_tables.h.");
    py::class_<Training>(m, "BpeTraining", "Counts the pieces of a corpus, then finds the merges.")
        .def(py::init<int>(), py::arg("threads"))
        .def("add", &Training::add, "Count the pieces of a list of texts (bytes).")
        .def("add_files", &Training::add_files, "Count the pieces of files.")
        .def("add_pieces", &Training::add_pieces, "Count pieces (bytes) that are split already.")
        .def("merges", &Training::merges, "At most n_merges merges; tie_break is 0 for hf, 1 for raw, 2 for first.")
        .def("__len__", &Training::size, "The number of distinct pieces.");
    py::class_<bpe::Model>(m, "BpeModel", "Encodes and decodes with a fixed vocabulary.")
        .def(py::init(&make_model), py::arg("tokens"), py::arg("specials"), py::arg("merges"), py::arg("results"),
             py::arg("by_bytes"), py::arg("whole_piece_first"),
             "tokens: bytes by id, empty where there is none. With by_bytes the merges come from the tokens.")
        .def("encode", &encode, "Ids of one text (bytes); specials is a list of (bytes, id) to parse.")
        .def("encode_pieces", &encode_pieces, "Ids of pieces (bytes) that are split already.")
        .def("encode_batch", &encode_batch, "(ids int32, offsets int64) of a list of texts (bytes).")
        .def("decode", &decode, "The bytes of ids (int64 array). KeyError for an unknown id.");
}
