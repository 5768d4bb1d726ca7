"""What a replay of recorded loads showed, as pictures and one HTML page."""
