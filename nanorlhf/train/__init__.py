"""The four stages. Each module is one loop over the pure functions of loss.py and the rooms below."""
