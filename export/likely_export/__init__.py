"""From pictures to a bundle: training, export, calibration, evaluation."""
