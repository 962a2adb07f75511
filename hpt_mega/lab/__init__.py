"""The lab: small models, arithmetic of rising difficulty, and every method on both at equal cost."""
