"""Speed beside peers. Every number is printed with the commit, the machine and the versions."""
