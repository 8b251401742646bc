"""The command line: it prints, and leaves the work to the other rooms. One file per command group."""
