"""What a node has released from its data so far, and what its owner still allows."""
