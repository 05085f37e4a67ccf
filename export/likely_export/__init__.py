"""Training, export, calibration and evaluation: everything from pictures to a bundle."""
