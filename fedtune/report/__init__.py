"""What finished runs say together: frontier, advice, tables, pictures and the page."""
