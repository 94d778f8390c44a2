"""Reference answers that are part of the course only; the others stand in the package itself."""
