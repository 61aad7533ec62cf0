"""GQA forms of model families to which transformers gives no setting for the number of KV heads."""
