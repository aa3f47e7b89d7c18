"""The mesh, what is sharded over it, and the exchanges that bring tokens to their experts."""
