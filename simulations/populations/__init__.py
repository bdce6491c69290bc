"""Research populations: users made of source code, of plays, and of mathematics."""
