"""From a mechanism to epsilon: losses, conversions, calibration, and the filter that stops a budget."""
