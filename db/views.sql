-- The public SQL interface. db/dialects.py says what each word in braces is on each database.

CREATE VIEW results AS
SELECT c.id AS clip_id, c.run_id, r.name AS run, coalesce(c.display_uri, c.uri) AS uri,
       c.start_s, c.end_s, c.channel, c.member,
       l.name AS label, c.score, c.meta,
       c.duration_s, c.source_sample_rate, c.channels, c.codec, c.truncated, c.silent,
       c.over_scale, c.cancelling, c.recorded_at, c.recorded_from, {json:c.tags} AS tags,
       c.reused, c.unheard, c.bytes, {hexadecimal:c.sha256} AS sha256,
       c.fetch_ms, c.decode_ms, c.classify_ms, c.worker, {timestamp:c.finished_at} AS finished_at
FROM clips c
JOIN runs r ON r.id = c.run_id
LEFT JOIN labels l ON l.id = c.label_id
WHERE c.state = 'done';

CREATE VIEW top_k AS
SELECT c.id AS clip_id, c.run_id, r.name AS run, coalesce(c.display_uri, c.uri) AS uri,
       c.start_s, c.end_s, c.channel, c.member,
       {rank} AS rank, l.name AS label, {score:c} AS score
FROM clips c
JOIN runs r ON r.id = c.run_id
CROSS JOIN {each_label:c}
JOIN labels l ON l.id = p.value;

CREATE VIEW windows AS
SELECT c.id AS clip_id, c.run_id, r.name AS run, coalesce(c.display_uri, c.uri) AS uri,
       w.start_s, w.end_s, nullif(w.channel, 0) AS channel, c.member,
       {rank} AS rank, l.name AS label, {score:w} AS score
FROM clips c
JOIN runs r ON r.id = c.run_id
JOIN window_predictions w ON w.clip_id = c.id
CROSS JOIN {each_label:w}
JOIN labels l ON l.id = p.value
UNION ALL
SELECT c.id, c.run_id, r.name, coalesce(c.display_uri, c.uri),
       coalesce(c.start_s, 0.0), coalesce(c.start_s, 0.0) + c.duration_s, c.channel, c.member,
       {rank}, l.name, {score:c}
FROM clips c
JOIN runs r ON r.id = c.run_id
CROSS JOIN {each_label:c}
JOIN labels l ON l.id = p.value
WHERE NOT EXISTS (SELECT 1 FROM window_predictions w WHERE w.clip_id = c.id);

CREATE VIEW embeddings AS
SELECT w.clip_id, w.run_id, w.run, w.uri, w.channel, w.member, w.start_s, w.end_s, e.vector
FROM (
  SELECT c.id AS clip_id, c.run_id, r.name AS run, coalesce(c.display_uri, c.uri) AS uri,
         coalesce(nullif(p.channel, 0), c.channel) AS channel, c.member, p.start_s, p.end_s,
         row_number() OVER (PARTITION BY c.run_id, c.id ORDER BY p.channel, p.start_s) AS number
  FROM clips c
  JOIN runs r ON r.id = c.run_id
  JOIN window_predictions p ON p.clip_id = c.id
) w
JOIN window_embeddings e ON e.clip_id = w.clip_id AND e.number = w.number - 1
UNION ALL
SELECT c.id, c.run_id, r.name, coalesce(c.display_uri, c.uri), c.channel, c.member,
       coalesce(c.start_s, 0.0), coalesce(c.start_s, 0.0) + c.duration_s, e.vector
FROM clips c
JOIN runs r ON r.id = c.run_id
JOIN window_embeddings e ON e.clip_id = c.id
WHERE NOT EXISTS (SELECT 1 FROM window_predictions p WHERE p.clip_id = c.id);

-- DISTINCT over windows of rows, not GROUP BY: SQLite would not use its index for one clip.
CREATE VIEW events AS
SELECT DISTINCT clip_id, run_id, run, uri, channel, member, label,
       min(start_s) OVER stretch AS start_s, max(end_s) OVER stretch AS end_s,
       max(score) OVER stretch AS score, count(*) OVER stretch AS windows
FROM (
  SELECT changed.*,
         sum(change) OVER (PARTITION BY run_id, clip_id, channel ORDER BY start_s) AS number
  FROM (
    SELECT best.*,
           CASE WHEN label = lag(label)
                OVER (PARTITION BY run_id, clip_id, channel ORDER BY start_s)
           THEN 0 ELSE 1 END AS change
    FROM windows best
    WHERE rank = 1
  ) changed
) numbered
WINDOW stretch AS (PARTITION BY run_id, clip_id, channel, label, number);

CREATE VIEW failures AS
SELECT c.id AS clip_id, c.run_id, r.name AS run, coalesce(c.display_uri, c.uri) AS uri,
       c.start_s, c.end_s, c.member,
       c.error_code, c.error_stage, c.error, c.attempts, c.crashes, c.meta, c.worker,
       {timestamp:c.finished_at} AS finished_at
FROM clips c
JOIN runs r ON r.id = c.run_id
WHERE c.state = 'failed';

-- Sums are cast, since those of PostgreSQL are decimals.
CREATE VIEW run_progress AS
SELECT r.id AS run_id, r.name AS run, CAST(coalesce(sum(n.clips), 0) AS bigint) AS total,
       CAST(coalesce(sum(CASE WHEN n.state = 'pending' THEN n.clips END), 0) AS bigint)
       - coalesce(max(f.leased), 0) AS pending,
       coalesce(max(f.leased - f.running), 0) AS queued, coalesce(max(f.running), 0) AS running,
       CAST(coalesce(sum(CASE WHEN n.state = 'done' THEN n.clips END), 0) AS bigint) AS done,
       CAST(coalesce(sum(CASE WHEN n.state = 'failed' THEN n.clips END), 0) AS bigint) AS failed,
       CAST(coalesce(sum(CASE WHEN n.state = 'cancelled' THEN n.clips END), 0) AS bigint)
       AS cancelled,
       coalesce(sum(n.audio_s), 0) AS audio_s, {timestamp:r.created_at} AS created_at, r.paused
FROM runs r
LEFT JOIN run_counts n ON n.run_id = r.id
LEFT JOIN (
  SELECT run_id, count(*) AS leased, count(token) AS running FROM leases GROUP BY run_id
) f ON f.run_id = r.id
GROUP BY r.id, r.name, r.created_at, r.paused;

CREATE VIEW label_counts AS
SELECT n.run_id, r.name AS run, l.name AS label, n.clips, n.mean_score, n.max_score
FROM (
  SELECT run_id, label_id, count(*) AS clips, avg(score) AS mean_score, max(score) AS max_score
  FROM clips
  WHERE state = 'done' AND label_id IS NOT NULL
  GROUP BY run_id, label_id
) n
JOIN runs r ON r.id = n.run_id
JOIN labels l ON l.id = n.label_id;

CREATE VIEW host_stats AS
SELECT run_id, run, host, count(*) AS clips, count(CASE WHEN state = 'done' THEN 1 END) AS done,
       count(CASE WHEN state = 'failed' THEN 1 END) AS failed,
       count(CASE WHEN state = 'failed' THEN 1 END) * 1.0
       / nullif(count(CASE WHEN state IN ('done', 'failed') THEN 1 END), 0) AS failure_rate,
       avg(fetch_ms) AS mean_fetch_ms, CAST(coalesce(sum(bytes), 0) AS bigint) AS bytes
FROM (
  SELECT shown.*, {host} AS host
  FROM (
    SELECT c.run_id, r.name AS run, coalesce(c.display_uri, c.uri) AS uri,
           c.state, c.fetch_ms, c.bytes
    FROM clips c
    JOIN runs r ON r.id = c.run_id
  ) shown
) hosted
GROUP BY run_id, run, host;

CREATE VIEW models_used AS
SELECT r.id AS run_id, r.name AS run, m.name AS model, m.revision, m.sha256, m.sample_rate,
       m.function_to_apply, m.window_s,
       (SELECT count(*) FROM labels l WHERE l.model_id = m.id) AS labels
FROM runs r
JOIN models m ON m.id = r.model_id;

-- The newest word on a label in a part of a clip.
CREATE VIEW reviews AS
SELECT v.clip_id, v.run_id, r.name AS run, coalesce(c.display_uri, c.uri) AS uri, c.member,
       v.start_s, v.end_s, v.channel, v.label, v.verdict, v.reviewer, {timestamp:v.at} AS at,
       v.sample_low, v.sample_high
FROM review_log v
JOIN clips c ON c.id = v.clip_id
JOIN runs r ON r.id = v.run_id
WHERE v.verdict <> 'shown' AND NOT EXISTS (
  SELECT 1 FROM review_log n
  WHERE n.clip_id = v.clip_id AND n.label = v.label AND n.verdict <> 'shown' AND n.id > v.id
  AND n.start_s {same} v.start_s AND n.end_s {same} v.end_s AND n.channel {same} v.channel
);

CREATE VIEW accepted AS
SELECT a.*, t.min_score, t."precision", t.confidence
FROM results a
JOIN thresholds t ON t.run_id = a.run_id AND t.label = a.label
WHERE a.score >= t.min_score;
