"""What both sides of bench_rl_step.py learn: nothing but the standard library."""


def reward(ids):
    """The share of even tokens in a response."""
    return sum(i % 2 == 0 for i in ids) / len(ids)


def words(ids):
    return [str(i) for i in ids]
