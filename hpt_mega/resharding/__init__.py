"""How weights travel between layouts: which tensor is which (mapping/). No communication lives here."""
