"""What other libraries need to know of us; each module needs the one that it is called after."""
