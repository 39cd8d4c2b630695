"""The settings of a run: schema, order of precedence, and every rule between them."""
