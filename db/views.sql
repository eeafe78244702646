-- The public SQL interface. In braces: what makes a timestamp of seconds since 1970 on either database.

CREATE VIEW results AS
SELECT c.id AS clip_id, c.run_id, r.name AS run, c.display_uri AS uri, l.name AS label, p.score, c.meta,
       c.duration_s, c.source_sample_rate, c.channels, c.codec, c.truncated, c.silent, c.reused, c.bytes, c.sha256,
       c.fetch_ms, c.decode_ms, c.classify_ms, c.worker, {time(}c.finished_at{)} AS finished_at
FROM clips c
JOIN runs r ON r.id = c.run_id
LEFT JOIN predictions p ON p.clip_id = c.id AND p.rank = 1
LEFT JOIN labels l ON l.id = p.label_id
WHERE c.state = 'done';

CREATE VIEW top_k AS
SELECT c.id AS clip_id, c.run_id, c.display_uri AS uri, p.rank, l.name AS label, p.score
FROM clips c
JOIN predictions p ON p.clip_id = c.id
JOIN labels l ON l.id = p.label_id;

CREATE VIEW windows AS
SELECT c.id AS clip_id, c.run_id, c.display_uri AS uri, w.start_s, w.end_s, w.rank, l.name AS label, w.score
FROM clips c
JOIN window_predictions w ON w.clip_id = c.id
JOIN labels l ON l.id = w.label_id;

CREATE VIEW failures AS
SELECT c.id AS clip_id, c.run_id, r.name AS run, c.display_uri AS uri, c.error_code, c.error_stage, c.error,
       c.attempts, c.crashes, c.meta, c.worker, {time(}c.finished_at{)} AS finished_at
FROM clips c
JOIN runs r ON r.id = c.run_id
WHERE c.state = 'failed';

CREATE VIEW run_progress AS
SELECT r.id AS run_id, r.name AS run, count(c.id) AS total,
       count(CASE WHEN c.state = 'pending' THEN 1 END) AS pending,
       count(CASE WHEN c.state = 'queued' THEN 1 END) AS queued,
       count(CASE WHEN c.state = 'running' THEN 1 END) AS running,
       count(CASE WHEN c.state = 'done' THEN 1 END) AS done,
       count(CASE WHEN c.state = 'failed' THEN 1 END) AS failed,
       count(CASE WHEN c.state = 'cancelled' THEN 1 END) AS cancelled,
       {time(}r.created_at{)} AS created_at
FROM runs r
LEFT JOIN clips c ON c.run_id = r.id
GROUP BY r.id, r.name, r.created_at;
