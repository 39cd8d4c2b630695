"""Sound of a video: a mono waveform, log-mel energies the way Kaldi computes them, and those as a picture.

    samples  ->  windows of 25 ms every 10 ms  ->  power spectrum  ->  mel filters  ->  log  ->  one gray pixel each

The encoder of images reads the picture: mel filters rising from the top row down, time to the right, in as many
whole blocks of patches as MOST_MELS filters hold: 112 filters, 8 patches, with the report's encoder. How many filters
MiCo's encoder reads is not stated in the report. The picture's width follows from the index alone.

Shapes: S samples, F windows, M mel filters, W pixels across.
"""

from typing import BinaryIO

import av
import kaldi_native_fbank as kaldi
import numpy as np

from tandem.data.media.video import SoundError, opened
from tandem.data.vision import VisionSpec

RATE = 16_000
WINDOW_MS, STEP_MS = 25, 10
MELS = 112  # of the report's patches
MOST_MELS = 126  # with more at this rate and window, Kaldi's lowest filters would lie between two frequencies
RATES = (4_000, 768_000)  # of tracks that are heard: at 1 Hz, 16-bit samples would grow 32,000-fold
MAX_CHANNELS = 64
MAX_PLANES = 8  # beyond these, PyAV's arrays of planar frames reach into memory that is not theirs
SILENCE = 1e-4  # a track within this range of values is silent; one step of 16-bit sound is 3e-5
# Of log energies, black and white: Kaldi's floor, which is silence, and a little more than loud speech has.
FLOOR, TOP = float(np.log(np.finfo(np.float32).eps)), 10.0


def sound_grid(duration_ms, seconds: float, vision: VisionSpec) -> np.ndarray:
    """Patches down and across, int32 [..., 2], of the sound of videos this long, of which at most `seconds` are heard.

    Down there are as many whole blocks of patches as MOST_MELS filters hold. What is heard is rounded up to whole
    blocks, one at least. Raises ValueError where sound is read and no block fits.
    """
    if seconds > 0 and vision.block > MOST_MELS:
        raise ValueError(
            f"data.audio_seconds={seconds}: a block of model.connector.merge={vision.merge} patches of "
            f"model.encoder.patch_size={vision.patch_size} needs {vision.block} mel filters, and there are at most "
            f"{MOST_MELS}"
        )
    down = max(MOST_MELS // vision.block, 1) * vision.block
    heard_ms = np.minimum(np.asarray(duration_ms, np.int64), int(np.ceil(seconds * 1000)))
    return vision.covering(down, -(-heard_ms // STEP_MS))


def spectrogram(file: BinaryIO, mels: int, windows: int) -> np.ndarray:
    """The sound of a video from its beginning, uint8 [M, W, 3] of M mel filters by W windows, three equal channels.

    A pixel is 255 * (energy - FLOOR) / (TOP - FLOOR) of the log energy, rounded and clipped; where the track ends
    before, black. Raises SoundError if there is no track, or it is damaged, empty or silent; VideoError if the file
    cannot be opened.
    """
    samples_S = decode_audio(file, samples=RATE * ((windows - 1) * STEP_MS + WINDOW_MS) // 1000)
    if len(samples_S) < RATE * WINDOW_MS // 1000:
        raise SoundError(f"the audio track holds {len(samples_S)} samples, less than one window of {WINDOW_MS} ms")
    if not np.isfinite(samples_S).all():
        raise SoundError("the audio track holds values that are not finite")
    if np.ptp(samples_S) <= SILENCE:
        raise SoundError(f"the audio track is silent for the {len(samples_S) / RATE:.1f} seconds that are heard of it")
    energy_FM = log_mel(samples_S, mels=mels)
    pixels_MW = np.zeros((mels, windows), np.uint8)
    scaled_FM = (energy_FM - FLOOR) * (255 / (TOP - FLOOR))
    pixels_MW[:, : len(scaled_FM)] = np.clip(np.rint(scaled_FM), 0, 255).T
    return np.repeat(pixels_MW[..., None], 3, axis=-1)


def decode_audio(file: BinaryIO, rate: int = RATE, samples: int | None = None) -> np.ndarray:
    """The first audio track, the mean of its channels, float32 [S] within -1 to 1; at most its first `samples`.

    Nothing is decoded beyond those, and of a frame at most a second beyond them resampled. Raises SoundError, also for
    a track outside RATES or of more than MAX_CHANNELS, and VideoError if the file cannot be opened.
    """
    resampler = av.AudioResampler(format="flt", rate=rate)
    parts, length = [np.zeros(0, np.float32)], 0
    with opened(file, "audio") as (container, stream):
        for frame in container.decode(stream):
            _check_track(frame.sample_rate, frame.layout.nb_channels)
            if samples is not None:
                frame = _beginning(frame, (samples - length + rate) * frame.sample_rate // rate)
            fresh = [_mono(part) for part in resampler.resample(frame)]
            parts += fresh
            length += sum(map(len, fresh))
            if samples is not None and length >= samples:
                break
        else:
            parts += [_mono(part) for part in resampler.resample(None)]
    return np.concatenate(parts)[:samples]


def _check_track(rate: int, channels: int) -> None:
    """Raises SoundError for what no recording has."""
    if not RATES[0] <= rate <= RATES[1]:
        raise SoundError(f"the audio track has {rate} samples a second; heard are {RATES[0]} to {RATES[1]}")
    if channels > MAX_CHANNELS:
        raise SoundError(f"the audio track has {channels} channels; the limit is {MAX_CHANNELS}")


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """The mean of the channels of a packed frame, float32 [S]."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).mean(1)


def _beginning(frame: av.AudioFrame, samples: int) -> av.AudioFrame:
    """A frame without what comes after its first `samples`; as it is, where it has more than MAX_PLANES."""
    planar, channels = frame.format.is_planar, frame.layout.nb_channels
    if frame.samples <= samples or (planar and channels > MAX_PLANES):
        return frame
    values: np.ndarray = frame.to_ndarray()[:, : samples * (1 if planar else channels)]
    short = av.AudioFrame.from_ndarray(np.ascontiguousarray(values), frame.format.name, frame.layout.name)
    short.sample_rate, short.time_base, short.pts = frame.sample_rate, frame.time_base, frame.pts
    return short


def log_mel(waveform_S: np.ndarray, rate: int = RATE, mels: int = MELS) -> np.ndarray:
    """Natural log of mel energies, float32 [F, M]; F = 1 + (S - 25 ms) // 10 ms, none for less than 25 ms.

    Kaldi's filter banks without dither: offset removed, pre-emphasis 0.97, Povey window, filters from 20 Hz to half
    the rate, a floor of 1.2e-7 under the log.
    """
    options = kaldi.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.frame_length_ms, options.frame_opts.frame_shift_ms = WINDOW_MS, STEP_MS
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = mels
    banks = kaldi.OnlineFbank(options)
    banks.accept_waveform(rate, np.asarray(waveform_S, np.float32).tolist())
    banks.input_finished()
    out_FM = np.empty((banks.num_frames_ready, mels), np.float32)
    for f in range(len(out_FM)):
        out_FM[f] = banks.get_frame(f)
    return out_FM
