"""An OpenAI-compatible server for adapters that cannot be converted exactly; needs ``pip install 'multiflora[serve]'``.

schema (what a request may say) → prepare (its tokens) → engine (batches, one thread) → answers (what goes back);
``app`` ties them to HTTP, ``run`` to a socket.
"""
