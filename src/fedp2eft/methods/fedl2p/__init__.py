"""FedL2P (Lee et al., NeurIPS 2023): a meta-net gives every client its own learning rates."""
