"""Every setting, typed, with the paper's values as defaults."""
