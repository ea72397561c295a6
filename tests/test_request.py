"""engine/request.py: what cannot be asked is refused in one sentence."""

import pytest

from nanorlhf.engine import Request, SamplingConfig


@pytest.mark.parametrize("changes, message", [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1 and top_logprobs at least 0, got 0 and 0"),
    ({"top_logprobs": -1}, "got 3 and -1"),
    ({"stop_text": "END"}, "stop_text is a list of texts that are not empty, got 'END'"),
    ({"stop_text": ("x", "")}, "stop_text is a list"),
])
def test_a_request_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": [1], "max_new_tokens": 3, **changes})


@pytest.mark.parametrize("changes, message", [({"temperature": -0.1}, "temperature of 0 or more, got -0.1"),
                                              ({"repetition_penalty": 0}, "repetition_penalty: expected a finite number above 0, got 0")])
def test_sampling_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)
