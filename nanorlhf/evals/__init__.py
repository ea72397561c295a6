"""What a run is judged by: bits per byte, win-rates, Elo, diversity and the gold judges."""
