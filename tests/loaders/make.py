"""Makes the models that the others load: `python -m tests.loaders.make DIRECTORY`."""

import sys
from pathlib import Path

import torch
import transformers
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tokenizers import Tokenizer, models, pre_tokenizers

LLAMA = {
    "vocab_size": 300,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def main(out: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "cake": 2, "is": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model("llama", **LLAMA)
    llama = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    pipeline = DDPMPipeline(UNet2DModel(**UNET), DDPMScheduler(num_train_timesteps=10))
    for kind, llama_shard, unet_shard in (("single", "1GB", "1GB"), ("sharded", "100KB", "300KB")):
        llama.save_pretrained(out / kind, max_shard_size=llama_shard)
        tokenizer.save_pretrained(out / kind)
        pipeline.save_pretrained(out / f"pipeline-{kind}", max_shard_size=unet_shard)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
