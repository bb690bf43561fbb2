"""Who holds which tokens and parameters, and how they move. Knows no model class."""
