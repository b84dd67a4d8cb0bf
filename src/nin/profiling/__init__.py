"""What a network costs: operations, memory and time."""
