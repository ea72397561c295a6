import math
import random
import shutil
import subprocess

import pytest

from nanorlhf.evals.bits import bits_per_byte, xz_bits_per_byte


def test_a_uniform_guess_among_256_bytes_costs_8_bits_each():
    """Each byte costs ln 256 nats."""
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8)


def test_noise_does_not_compress_and_repetition_does():
    noise = random.Random(0).randbytes(100_000)
    assert 8 <= xz_bits_per_byte(noise) < 8.02
    assert xz_bits_per_byte("the same line\n" * 10_000) < 0.02


def test_the_baseline_is_what_the_xz_program_reaches(tmp_path):
    """The program aligns and checks the same way, so sizes differ by the container's few bytes at most."""
    if shutil.which("xz") is None:
        pytest.skip("xz is not installed")
    words = random.Random(1).choices("the of and to in that it was his her with é".split(), k=40_000)
    text = " ".join(words)
    file = tmp_path / "text"
    file.write_text(text, encoding="utf-8")
    size = len(subprocess.run(["xz", "-9", "-k", "-c", str(file)], capture_output=True, check=True).stdout)
    n_bytes = len(text.encode())
    assert xz_bits_per_byte(text) * n_bytes / 8 == pytest.approx(size, abs=32)


def test_bytes_and_their_text_are_the_same_input():
    assert xz_bits_per_byte("naïve ☃" * 99) == xz_bits_per_byte(("naïve ☃" * 99).encode())


def test_empty_text_gets_one_sentence():
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        bits_per_byte(1.0, 0)
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        xz_bits_per_byte("")
