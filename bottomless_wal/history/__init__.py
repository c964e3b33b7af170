"""The remote log of a database: list its segments, plan a way through them, restore, compact and retain states."""
