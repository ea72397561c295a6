// Python's side of csrc/automaton and csrc/token_mask. The GIL is kept: a mask takes microseconds, and an automaton grows
// while it is walked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <tuple>

#include "token_mask.h"

namespace py = pybind11;
using automaton::Automaton;
using token_mask::Masks;
using token_mask::Vocabulary;

namespace {

using Arcs = py::array_t<int32_t, py::array::c_style>;

template <class Arc>
std::vector<Arc> arcs(const Arcs& array) {
    constexpr size_t columns = sizeof(Arc) / sizeof(int32_t);
    if (array.ndim() != 2 || array.shape(1) != static_cast<py::ssize_t>(columns))
        throw py::value_error("Automaton: expected arcs of " + std::to_string(columns) + " columns");
    std::vector<Arc> out(array.shape(0));
    if (!out.empty()) std::memcpy(static_cast<void*>(out.data()), array.data(), out.size() * sizeof(Arc));
    return out;
}

int32_t checked(const Automaton& a, int32_t node) {
    if (node < 0 || static_cast<size_t>(node) >= a.size()) throw py::value_error("Automaton: expected a node that it has given out");
    return node;
}

std::vector<std::string_view> views(const py::list& tokens) {
    std::vector<std::string_view> out;
    for (py::handle token : tokens) {
        char* data;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(token.ptr(), &data, &size)) throw py::error_already_set();
        out.emplace_back(data, static_cast<size_t>(size));
    }
    return out;
}

}  // namespace

void bind_token_mask(py::module_& m) {
    py::class_<Automaton>(m, "Automaton", "A language of bytes, made deterministic as it is walked (csrc/automaton.h).")
        .def(py::init([](int32_t states, int32_t start, const Arcs& edges, const Arcs& jumps, const Arcs& calls, std::vector<int32_t> ends) {
                 return std::make_unique<Automaton>(automaton::Network{states, start, arcs<automaton::Edge>(edges), arcs<automaton::Jump>(jumps),
                                                                       arcs<automaton::Call>(calls), std::move(ends)});
             }),
             py::arg("states"), py::arg("start"), py::arg("edges").noconvert(), py::arg("jumps").noconvert(), py::arg("calls").noconvert(),
             py::arg("ends"), "edges (E, 4) int32: from, low, high, to; jumps (J, 2): from, to; calls (C, 3): from, rule, back.")
        .def("start", &Automaton::start, "The node of the empty text.")
        .def("size", &Automaton::size, "The nodes made so far.")
        .def("complete", [](const Automaton& a, int32_t node) { return a.complete(checked(a, node)); }, "Whether the text is whole at a node.")
        .def(
            "walk",
            [](Automaton& a, int32_t node, const py::bytes& text) {
                checked(a, node);
                for (const char c : std::string_view(text)) {
                    node = a.next(node, static_cast<uint8_t>(c));
                    if (node == automaton::kDead) break;
                }
                return node;
            },
            "The node after these bytes, or -1 where no text goes on so.")
        .def(
            "row",
            [](Automaton& a, int32_t node) {
                const int32_t* row = a.row(checked(a, node));
                std::vector<std::tuple<int, int, int32_t>> out;
                for (int b = 0; b < 256; b++) {
                    const int32_t to = row[a.classes()[b]];
                    if (to == automaton::kDead) continue;
                    if (!out.empty() && std::get<1>(out.back()) == b - 1 && std::get<2>(out.back()) == to) std::get<1>(out.back()) = b;
                    else out.emplace_back(b, b, to);
                }
                return out;
            },
            "What follows a node: (low, high, next node), in the order of the bytes.")
        .def(
            "forced",
            [](Automaton& a, int32_t node, size_t most) {
                std::string out;
                checked(a, node);
                for (; out.size() < most && !a.complete(node);) {
                    const int32_t* row = a.row(node);
                    int only = -1, found = 0;
                    for (int b = 0; b < 256 && found < 2; b++)
                        if (row[a.classes()[b]] != automaton::kDead) only = b, found++;
                    if (found != 1) break;
                    out.push_back(static_cast<char>(only));
                    node = row[a.classes()[only]];
                }
                return py::bytes(out);
            },
            "The bytes, at most so many, that must follow a node whatever else does.");
    py::class_<Vocabulary>(m, "MaskVocabulary", "A vocabulary as trees of bytes (csrc/token_mask.h).")
        .def(py::init([](const py::list& tokens) { return std::make_unique<Vocabulary>(views(tokens)); }), py::arg("tokens"))
        .def(
            "mask",
            [](const Vocabulary& v, Automaton& a, int32_t node) {
                py::array_t<int32_t> out(static_cast<py::ssize_t>(v.words()));
                v.mask(a, checked(a, node), reinterpret_cast<uint32_t*>(out.mutable_data()));
                return out;
            },
            "int32 (ceil(V / 32),): bit j % 32 of word j / 32 says whether token j may come at a node.");
    py::class_<Masks>(m, "Masks", "The masks of one language, kept by node (csrc/token_mask.h).")
        .def(py::init<const Vocabulary&, Automaton&, const std::vector<int32_t>&, size_t>(), py::arg("vocabulary"), py::arg("automaton"),
             py::arg("ends"), py::arg("bytes"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def("__len__", &Masks::count)
        .def("known", &Masks::known, "Whether the node's mask is kept.")
        .def(
            "mask",
            [](Masks& masks, int32_t node) -> py::object {
                if (!masks.has(node)) throw py::value_error("Masks: expected a node that the automaton has given out, got " + std::to_string(node));
                const uint32_t* row = masks.row(node);
                if (!row) return py::none();
                py::array_t<int32_t> out(static_cast<py::ssize_t>(masks.words()));
                std::memcpy(out.mutable_data(), row, 4 * masks.words());
                return out;
            },
            "As MaskVocabulary.mask, with the end tokens; None where nothing may come.");
}
