"""Foreign vision-language models seen from outside: geometry, prompts, loading."""
