"""Calibration sets: the text that a method looks at, drawn from whole files and kept apart from held-out text."""

# The file beside a model's weights that says what it was calibrated on.
RECORD = "calibration.json"
# The word that stands for text which the dense model writes itself.
OWN = "self"
