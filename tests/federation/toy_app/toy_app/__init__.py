"""A federation of clients that pull one array towards a number of their own."""
