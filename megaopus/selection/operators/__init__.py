"""Linear maps from a gradient to an update (``maps``), and how each optimizer's is found from its state."""

from megaopus.selection.operators.maps import Adaptive, Derivative, Diagonal, OneSided, ParameterOperator, Rotated

__all__ = ["Adaptive", "Derivative", "Diagonal", "OneSided", "ParameterOperator", "Rotated"]
