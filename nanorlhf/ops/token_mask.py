"""Which tokens of a vocabulary may come next in a text of a language. Native on the CPU (csrc/automaton.h, csrc/token_mask.h).

`Automaton(states, start, edges, jumps, calls, ends)` is a language of bytes as a network of states, made deterministic as it is
walked; `MaskVocabulary(tokens)` is a vocabulary as trees of bytes, and its `mask(automaton, node)` is one bit a token; `Masks(vocabulary,
automaton, ends, bytes)` keeps them, with the tokens that end a text.
"""

import numpy as np

from nanorlhf import _C

Automaton = _C.Automaton
MaskVocabulary = _C.MaskVocabulary
Masks = _C.Masks


def token_mask_reference(tokens: list[bytes], automaton: Automaton, node: int) -> np.ndarray:
    """The mask by walking each token alone: int32 (ceil(V / 32),), bit j % 32 of word j / 32 for token j, none for b"".

    >>> a_or_bc = Automaton(3, 0, *(np.array(arcs, np.int32) for arcs in (
    ...     [[0, 97, 97, 2], [0, 98, 98, 1], [1, 99, 99, 2]], np.empty((0, 2)), np.empty((0, 3)))), [2])
    >>> token_mask_reference([b"a", b"b", b"bc", b"c", b""], a_or_bc, a_or_bc.start())
    array([7], dtype=int32)
    """
    allowed = [bool(token) and automaton.walk(node, token) >= 0 for token in tokens]
    bits = np.zeros(-(-len(tokens) // 32) * 32, np.uint8)
    bits[: len(tokens)] = allowed
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
