"""The front door: what a person types, sees and hears."""
