"""What a run tells: the record that becomes llmprune.json, and the tables on the terminal."""
