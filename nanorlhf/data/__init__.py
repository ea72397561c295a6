"""Where real text comes from, how it is mixed and packed, and the prompts, pairs and labels made of it."""
