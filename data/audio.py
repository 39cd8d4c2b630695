"""Sound of a video as a mono waveform, and as log-mel energies the way Kaldi computes them.

    samples  ->  windows of 25 ms every 10 ms  ->  power spectrum  ->  mel filters  ->  log

Shapes: S samples, F frames, M mel filters.
"""

from typing import BinaryIO

import av
import kaldi_native_fbank as kaldi
import numpy as np

from data.video import opened

RATE = 16_000
MELS = 80


def decode_audio(file: BinaryIO, rate: int = RATE) -> np.ndarray:
    """The first audio track, the mean of its channels, float32 [S] within -1 to 1. Raises VideoError."""
    resampler = av.AudioResampler(format="fltp", rate=rate)
    with opened(file, "audio") as (container, stream):
        parts = [part for frame in container.decode(stream) for part in resampler.resample(frame)]
        parts += resampler.resample(None)
    return np.concatenate([np.zeros(0, np.float32), *(part.to_ndarray().mean(0) for part in parts)])


def log_mel(waveform_S: np.ndarray, rate: int = RATE, mels: int = MELS) -> np.ndarray:
    """Natural log of mel energies, float32 [F, M]; F = 1 + (S - 25 ms) // 10 ms, none for less than 25 ms.

    Kaldi's filter banks without dither: offset removed, pre-emphasis 0.97, Povey window, filters from 20 Hz to half
    the rate, a floor of 1.2e-7 under the log.
    """
    options = kaldi.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = mels
    banks = kaldi.OnlineFbank(options)
    banks.accept_waveform(rate, np.asarray(waveform_S, np.float32).tolist())
    banks.input_finished()
    out_FM = np.empty((banks.num_frames_ready, mels), np.float32)
    for f in range(len(out_FM)):
        out_FM[f] = banks.get_frame(f)
    return out_FM
