"""What a person looks at: the page of a run or comparison, its figures, the terminal's summary."""
