"""Everything that reads a finished cell: metrics, tables, figures, cards."""
