"""The figures that every stage has, one noun a file. None of them reads the database: they get frames."""
