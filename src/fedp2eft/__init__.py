"""FedP²EFT."""
