"""How weights travel: which tensor is which (mapping/), the plan of an update, its ways to the engines."""
