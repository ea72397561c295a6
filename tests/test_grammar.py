"""Grammars against languages derived by hand."""

from itertools import product

import constrained
import pytest

from nanorlhf.engine.constrain import constrain, grammar


def strings(letters, longest):
    return ("".join(text) for n in range(longest + 1) for text in product(letters, repeat=n))


def balanced(text):
    depth = 0
    for sign in text:
        depth += {"(": 1, ")": -1}[sign]
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize("text", [
    'root ::= "(" root ")" root | ""', 'root ::= ("(" root ")")*', 'root ::= root "(" root ")" | ""', 'root ::= "" | pair root\npair ::= "(" root ")"',
])  # fmt: skip
def test_balanced_parentheses(text):
    """However it is written. Of 2n signs there are Catalan(n): 1, 1, 2, 5, 14, 42 texts."""
    found = constrained.texts(grammar(text), 10)
    assert found == {text for text in strings("()", 10) if balanced(text)}
    assert [sum(len(text) == 2 * n for text in found) for n in range(6)] == [1, 1, 2, 5, 14, 42]


def test_palindromes():
    found = constrained.texts(grammar('root ::= "a" root "a" | "b" root "b" | "a"? | "b"'), 7)
    assert found == {text for text in strings("ab", 7) if text == text[::-1]}


def test_as_many_of_one_as_of_the_other():
    found = constrained.texts(grammar('root ::= "a" root "b" | ""'), 8)
    assert found == {"a" * n + "b" * n for n in range(5)}


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_left_recursion_is_a_repetition():
    """sum ::= sum + term | sum - term | term is a term, then signs with terms."""
    found = constrained.texts(grammar('root ::= root "+" term | root "-" term | term | root\nterm ::= [01] | "(" root ")"'), 5)

    def whole(text):  # by Python's own grammar, of which this is a part
        try:
            compile(text, "", "eval")
        except SyntaxError:
            return False
        signs = text.replace("(", "").replace(")", "")
        return all(a not in "+-" or b not in "+-" for a, b in zip("+" + signs, signs, strict=False)) and not any(
            a in "01" and b in "01" for a, b in zip(text, text[1:], strict=False)) and "()" not in text and all(
            not (a in "01)" and b == "(") for a, b in zip(text, text[1:], strict=False))

    assert found == {text for text in strings("01+-()", 5) if text and whole(text)}


def test_notation():
    r"""Each kind of part once: texts with escapes, classes, regular expressions, any character, bounds, groups, comments, lines."""
    language = grammar(r'''
        # a comment
        root ::= "x\n\"" [a-b]{2} (/c|d{1,2}\/?/ | other)?   # another
                 | .{1,1} "!"
        other-one ::= "not used"
        other ::= "é"{2,}
    ''')
    for text, whole in (('x\n"ab', True), ('x\n"abdd/', True), ('x\n"abc', True), ('x\n"abéé', True), ('x\n"abé', False), ("日!", True), ("\n!", True), ("!", False)):
        assert constrained.accepts(language, text) == whole, text


def test_another_start():
    assert constrained.texts(grammar('a ::= b b\nb ::= "x" | "y"', start="b"), 3) == {"x", "y"}


def test_deep_nesting_is_followed():
    constraint = constrain(grammar('root ::= "[" root "]" | "x"'), constrained.byte_vocabulary(), [256])
    state = constraint.start()
    for _ in range(500):
        assert set(constraint.allowed(state)) == set(b"[x")
        state = constraint.advance(state, ord("["))
    state = constraint.advance(state, ord("x"))
    for _ in range(500):
        assert constraint.allowed(state) == [ord("]")]
        state = constraint.advance(state, ord("]"))
    assert constraint.allowed(state) == [256]


@pytest.mark.parametrize("text, words", [
    ("", "a rule called root, got no rules"), ('other ::= "a"', "a rule called root, got other"), ('root ::= "a" missing', "the rule missing of line 1"),
    ('root ::= "a"\nroot ::= "b"', "one rule root, got another in line 2"), ('root ::= ("a"', "a closing parenthesis in line 1, got the grammar's end"),
    ('root ::= "a" )', "in line 1, got \\)"), ('root ::= "a\n"', "in line 1, got '\"a"), ('root ::= "\\q"', "the escapes of JSON in line 1"), ("root ::= /(?=a)/", "in line 1, regex: expected"),
    ('root ::= "a"{3,2}', "bounds in order in line 1"), ("root ::= *", "in line 1, got \\*"), ('\n"a"', "a rule, name ::= …, in line 2"), ("root ::= [b-a]", "in line 1, regex"),
    ('root ::= "a" {}', "bounds"), (3, "a grammar as a str"),
])  # fmt: skip
def test_what_is_not_in_the_notation_is_an_error_with_its_line(text, words):
    with pytest.raises(ValueError, match=words) as error:
        grammar(text)
    assert str(error.value).startswith("grammar: ")


def test_a_grammar_that_is_nested_too_deeply_is_an_error():
    with pytest.raises(ValueError, match="^grammar: expected less nesting"):
        grammar("root ::= " + "(" * 9000 + '"a"' + ")" * 9000)


def test_a_grammar_that_derives_nothing_is_an_error():
    with pytest.raises(ValueError, match="none that satisfies the grammar"):
        constrain(grammar('root ::= "a" root'), constrained.byte_vocabulary(), [256])
