"""What a run writes for people and tools: records, tables, reports, and its folder."""
