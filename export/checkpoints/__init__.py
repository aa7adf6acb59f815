"""Files in and out: one interface, one opener, a file per format, the family tables. May import model."""
