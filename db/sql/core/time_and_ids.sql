-- Time and ids.
--
-- Time and ids. id_at and iso are declared stable: were they immutable, PostgreSQL would not expand them in place, for
-- their bodies call what is stable (date_part, to_char), and each call would cost four times as much.

create or replace function surety.time_now() returns timestamptz
language sql stable parallel safe
begin atomic
    select statement_timestamp() + coalesce((select clock.ahead from surety.clock), interval '0');
end;

comment on function surety.time_now() is
'The one source of time: the statement''s, moved only where surety.clock has a row (a test database).';

-- The first id of an instant: prefix and 12 hex digits of milliseconds.
create or replace function surety.id_at(p_prefix text, p_at timestamptz) returns text
language sql stable parallel safe
begin atomic
    select p_prefix || '_' || substr(encode(int8send(floor(date_part('epoch', p_at) * 1000)::bigint), 'hex'), 5);
end;

create or replace function surety.new_id(p_prefix text, p_at timestamptz) returns text
language sql volatile parallel restricted
begin atomic
    -- A server built without OpenSSL opens /dev/urandom for every uuid, ten times the cost of all the rest. random() is
    -- seeded from there once per session; ids need to be unique, not secret.
    select
        surety.id_at(p_prefix, p_at)
        || lpad(to_hex((random() * 1099511627775)::bigint), 10, '0')
        || lpad(to_hex((random() * 1099511627775)::bigint), 10, '0');
end;

comment on function surety.new_id(text, timestamptz) is
'A fresh id: prefix, underscore, 12 hex digits of milliseconds, 20 random ones. Ids of one prefix sort by time.';

insert into surety.environment (id, kind) select surety.new_id('env', surety.time_now()), 'production'
where not exists (select from surety.environment);
